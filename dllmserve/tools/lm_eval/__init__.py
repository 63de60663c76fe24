"""The model ``dllmserve`` of lm-eval, in one process with it: ``python -m dllmserve.lm_eval``."""
