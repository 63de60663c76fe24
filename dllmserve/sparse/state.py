"""The documented place of SparseConfig, beside ``dllmserve`` itself."""

from dllmserve._values import SparseConfig as SparseConfig
