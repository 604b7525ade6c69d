"""Anthropic's Messages API: its fields, its blocks, its events. Knows no HTTP and no engine."""
