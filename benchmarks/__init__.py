"""Measurements that back what the documents claim; each script writes one file under results/."""
