"""Options that several commands of `sparseline` share."""

import typer

RUNS = typer.Option(help="folder of runs", envvar="SPARSELINE_RUNS")
PIPELINE = typer.Option(help="training, retraining, evaluation or synthesis")
PROFILE = typer.Option(help="profile by name (`sparseline profiles`)")
ENDPOINT = typer.Option(help="address of Kubeflow Pipelines", envvar="KFP_ENDPOINT")
NAMESPACE = typer.Option(help="namespace, where Kubeflow Pipelines serves many users", envvar="KFP_NAMESPACE")
ACCOUNT = typer.Option(help="Kubernetes service account of the pods; default: that of KFP")
VERSION = typer.Option(help="a registered version by name; default: the one of these sources")
UPLOAD = typer.Option(help="upload the version when the server lacks it (--no-upload: Git registers versions)")
