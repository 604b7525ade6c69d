"""What failures of a coordinator become."""

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from cluster.errors import ExpertUnavailable
from gateway.coordinators.serve_client import manta_error

wrapped = RayTaskError("generate", "traceback", ExpertUnavailable("no expert", retry_after_s=4.0))
print(manta_error(wrapped).retry_after_s, manta_error(wrapped.as_instanceof_cause()).message)
for error in (ActorDiedError(), BackPressureError(1, 1), KeyError("x"), TimeoutError()):
    print(type(manta_error(error)).__name__)
