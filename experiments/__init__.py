"""The studies behind the tables in the documentation. `make paper` runs all of them."""
