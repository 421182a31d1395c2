"""The verbs of the command line. Each verb is a module or a package.

In a package, ``driver`` runs the verb, ``job`` divides it into parts, and ``worker`` runs on Ray. No verb imports
another verb; the command line imports only the verb that was called.
"""
