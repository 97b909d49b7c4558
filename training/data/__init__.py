"""The data pipeline: collect records, filter them in the report's seven stages, write shards and an audit of all.

Sections 3.1 and 3.2 of arXiv 2508.02324; docs/data.md says what exists and what does not.
"""
