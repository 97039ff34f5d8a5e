"""The merge engine: recipe, plan, files, run, verify."""
