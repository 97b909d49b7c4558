"""The filters of the seven stages; `..pipeline` runs them in order."""
