"""hydragrad beside what else there is: really retrained, on the same runs. `make compare`; see README.md here."""
