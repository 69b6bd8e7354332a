"""Why a checkpoint loops, breaks the notation or never ends: measured on gold traces and on what it writes itself."""
