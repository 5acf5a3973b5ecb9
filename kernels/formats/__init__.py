"""Weight formats: `registry` names them all, `base` says what one is."""
