"""The page of results: folders read, numbers put in words and figures."""
