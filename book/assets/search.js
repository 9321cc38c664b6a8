// From disk a browser lets no page read another: the search shows titles, and asks for no lines around what it found.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
