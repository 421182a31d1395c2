"""The commands. A verb is a module, or a package: ``driver`` runs it, ``job`` has its parts, ``worker`` runs on Ray.

No verb imports another; the command line imports only the verb that was called.
"""
