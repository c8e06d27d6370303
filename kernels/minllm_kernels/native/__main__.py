"""python -m minllm_kernels.native: build the CPU kernels of this machine."""

import sys

from minllm_kernels import native

if __name__ == "__main__":
    try:
        print(native.build())
    except RuntimeError as error:
        sys.exit(str(error))
