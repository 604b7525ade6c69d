"""chat.proto, and what protoc makes of it (nobody edits that)."""
