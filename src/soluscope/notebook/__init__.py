"""Functions for notebooks, one file each. `soluscope` has them by name: `soluscope.tokens`, `soluscope.study`, …"""
