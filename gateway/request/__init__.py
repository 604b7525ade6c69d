"""What callers ask: fields, bounds, tools, schemas, prompts, one validator for both doors.

Knows no HTTP, gRPC or answer.
"""
