"""How many bytes the gateway's class has when Serve pickles it."""

from ray import cloudpickle

from gateway.service import Gateway

print(len(cloudpickle.dumps(Gateway.func_or_class)))
