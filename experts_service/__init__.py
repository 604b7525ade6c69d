"""The experts: actors that hold weights, the services that supervise them, and the transports that reach them."""
