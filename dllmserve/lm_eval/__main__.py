"""``python -m dllmserve.lm_eval``, see :mod:`dllmserve.tools.lm_eval.__main__`."""

from dllmserve.tools.lm_eval.__main__ import main

if __name__ == "__main__":
    main()
