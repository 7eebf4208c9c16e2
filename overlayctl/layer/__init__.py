"""One layer: from any tar to a file that is at once the tar and a filesystem."""
