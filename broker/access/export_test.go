package access

// ConnectedByPages is Connected with a page of any size.
var ConnectedByPages = connected
