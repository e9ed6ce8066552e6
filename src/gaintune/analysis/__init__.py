"""What can be learnt from adapters and their models, beyond losses: gates, and the linear model of the DISeL paper."""
