"""The networks: blocks, the graph of nodes, the variants, and names in weight files."""
