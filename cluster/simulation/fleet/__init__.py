"""A fleet over hours: who arrives, how many replicas the product's policies ask for, what that costs and who is late.

    trace, popularity       what is asked for
    step_costs              how long a step takes, by the planner's arithmetic
    queue, deployment       a coordinator's sequences; the replicas of a deployment, and Serve's delays
    fleet, variants         one way to serve that, event by event; the four ways that are compared
    outcome, break_even     what came of it

Knows no tensors, no sockets and no Ray. A step is not simulated token by token: between two events of a coordinator
its step takes the same time, and each of its sequences gets a token in each.
"""
