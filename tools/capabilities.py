"""Print the CPU capabilities of torch below the one that it takes by itself, one on a line.

    for level in $(python tools/capabilities.py); do ATEN_CPU_CAPABILITY=$level pytest ...; done

torch chooses vector instructions by the processor; ATEN_CPU_CAPABILITY makes it choose lesser
ones, whose results differ in the last bits.
"""

from __future__ import annotations

import os
import sys

#: from low to high, as ATEN_CPU_CAPABILITY spells them
LADDER = ("default", "avx2", "avx512")


def below(own: str) -> tuple[str, ...]:
    """What a processor of capability ``own`` can be told to do with, besides that.

    Example:
        >>> below("avx512"), below("default"), below("sve256")
        (('default', 'avx2'), (), ('default',))
    """
    return LADDER[: LADDER.index(own)] if own in LADDER else LADDER[:1]


def main() -> int:
    """Print them; what torch takes by itself goes to standard error."""
    os.environ.pop("ATEN_CPU_CAPABILITY", None)  # read when torch is loaded
    import torch

    own = torch.backends.cpu.get_cpu_capability().lower()
    print(f"this processor's own CPU capability is {own}", file=sys.stderr)
    print("\n".join(below(own)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
