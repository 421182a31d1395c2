"""What a user types. A verb is a file, or a folder: ``driver`` runs it, ``job`` has its parts, ``worker`` runs on Ray.

No verb imports another; the command line imports the one that was asked for.
"""
