"""What moves rows: lanes, the object store, or nothing at all. Post, poll and cancel; decides nothing."""
