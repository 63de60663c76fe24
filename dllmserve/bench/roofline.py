"""The documented name of :mod:`dllmserve.tools.bench.roofline`."""

from dllmserve.tools.bench.roofline import Ceilings as Ceilings
from dllmserve.tools.bench.roofline import ModelCost as ModelCost
