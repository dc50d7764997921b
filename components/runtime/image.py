"""The container image of the stages. On a cluster it is given by digest; locally nothing is pulled.

KFP's local runner expects "python" in the name of an image that runs Python.
"""

import os

IMAGE = os.environ.get("SPARSELINE_IMAGE", "sparseline-python:0.1.0")
