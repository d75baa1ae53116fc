"""Makes a checkpoint of a Hugging Face folder's weights, for checkpoint.initial_load_path.

    python scripts/checkpoint_conversion/convert_from_hf.py INPUT OUTPUT --model_name llama3 --model_flavor 8B

Not needed to train from such a folder: checkpoint.initial_load_in_hf = true reads it directly.
"""

import sys

from arguments import Arguments, run

from torchtitan.checkpoint.hf_convert import from_hf


def convert(args: Arguments) -> None:
    from_hf(args.input, args.output, args.model_config, args.model_name, args.dtype)


if __name__ == "__main__":
    sys.exit(run(convert, __doc__))
