"""The public operations, one file each: check the arguments, allocate the output, run the chosen backend."""
