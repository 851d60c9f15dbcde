// Loaded before anything is drawn, so that a page in the dark does not begin with a flash of light.
{
  const theme = localStorage.getItem("llama-router theme");
  if (theme) document.documentElement.dataset.theme = theme;
}
