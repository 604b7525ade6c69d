"""The decoder's layers and the runner that feeds them a batch. Knows no queue, no sampling."""
