"""Sections of params.yaml that several tests need and none is about."""

HARDWARE = {
    "nproc": 1,
    "threads": 1,
    "workers": 1,
    "max_restarts": 0,
    "nnodes": 1,
    "rdzv_endpoint": None,
    "local_addr": None,
}
