"""BlockProp beside the pipelines that torch has, and beside data parallelism: `python -m benchmarks.pipelines`."""
