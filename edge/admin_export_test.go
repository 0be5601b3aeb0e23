package edge

// Routes lists what the edge serves, as method and path.
func (e *Edge) Routes() (list [][2]string) {
	for _, r := range e.app.GetRoutes(true) {
		list = append(list, [2]string{r.Method, r.Path})
	}
	return list
}
