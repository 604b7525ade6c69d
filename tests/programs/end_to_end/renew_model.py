"""The same application again, as a release with other code would: to Serve it is a new version.

python -m tests.programs.end_to_end.renew_model manta.yaml RAY_ADDRESS
"""

import sys
from pathlib import Path

import ray
from ray import serve

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.config import load_config
from cluster.deploy import app
from cluster.deploy.app import describe_cluster, model_application, plan_model

ray.init(address=sys.argv[2], log_to_driver=False)
config = load_config(Path(sys.argv[1]))
app.version = lambda _: "another release"
plan = plan_model(config.models[0], open_checkpoint(config.models[0].path), describe_cluster(ray.nodes()))
serve.run(model_application(plan, config.gateway), name=plan.application, route_prefix=None)
