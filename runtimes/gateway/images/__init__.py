"""Images of a request: fetched, decoded, judged and written anew."""
