"""What a run will cost, from shapes alone: memory, disk, operations, hours."""
