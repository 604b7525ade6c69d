"""JSON Schema, as far as both doors and coordinators have to read it. Knows its words; knows no request, no grammar."""
