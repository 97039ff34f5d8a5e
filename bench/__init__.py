"""The roofline table: every op against the memory bandwidth of the same run, and against its peers."""
