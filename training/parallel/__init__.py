"""Training on several processes: data parallel (replicate x shard), tensor parallel and context parallel.

`layout.py` the device mesh, `tensor.py` head-wise tensor parallel, `shard.py` FSDP2
and loading by slices, `checkpoints.py` what a run goes on from, `export.py` the result, `watch.py` ranks that die,
`plan.py` what a run will need. See docs/distributed.md.
"""
