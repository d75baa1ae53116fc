"""Makes a folder that transformers opens of a checkpoint, be it complete or of weights alone.

    python scripts/checkpoint_conversion/convert_to_hf.py INPUT OUTPUT --model_name llama3 --model_flavor 8B

Not needed after training: checkpoint.last_save_in_hf = true ends in such a folder.
"""

import sys

from arguments import Arguments, run

from torchtitan.checkpoint.hf_convert import to_hf


def convert(args: Arguments) -> None:
    to_hf(
        args.input, args.output, args.model_config, args.model_name, args.dtype, args.hf_assets_path
    )


if __name__ == "__main__":
    sys.exit(run(convert, __doc__, takes_assets=True))
