"""Rules in the EBNF of xgrammar: of JSON Schemas, strings, numbers and texts. Knows no call, vocabulary or process."""
