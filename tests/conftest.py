"""What all tests need before torch is imported."""

import os
import sys


# DeepSpeed compiles what it needs into a folder that all environments of a user share, whatever their versions.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
