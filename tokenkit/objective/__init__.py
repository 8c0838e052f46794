"""Several losses, one gradient: what each loss weighs, and how their gradients are joined.

options.py       what a user says of both
weights.py       loss_weights, schedules and the weights that move with the losses
aggregation.py   from the inner products of the losses' gradients to what each of them weighs
"""
