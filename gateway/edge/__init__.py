"""What stands before all of Serve's own code: clients' headers in, Serve's own answers out.

Knows ASGI; knows no route.
"""
