"""Choosing a draft tree by measurement: acceptance and costs, the best tree under both, checks, plans and pictures."""
